"""Error-guided Budgeted Calibration (HASTE): a threshold for every head under one budget.

plan.py        what is drawn: videos, steps, heads' prompts; the list of work units
states.py      dense runs, and what calibration keeps of them
intercept.py   step into every self-attention of a transformer
objective.py   the error of a velocity in four bands of a 3-D FFT
exact.py       the paper's form: one head sparse at a time
gradient.py    ours: probes sent backwards, all heads at once
allocate.py    candidate thresholds to heads by integer programme; quadratic.py with interactions
drift.py       δ of temporal mask reuse for every head
profile.py     the result on disk; validate.py checks it, use.py brings it into a graph's state
journal.py     work done so far, on disk; run.py drives all of it
"""
