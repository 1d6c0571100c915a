"""nano-wan: the small Wan-architecture text-to-video model that ships inside haste_compile.

``render`` draws the clips, ``model`` builds the pipeline, ``train`` trains it, ``detect`` reads colour, shape
and direction back from a clip, ``evaluate`` measures a finished pipeline on prompts that training never saw,
``model_card`` writes down what came of it.
"""
