"""The two ops as TensorRT plugins, for engines that torch-tensorrt builds (``artifacts.tensorrt``).

An ahead-of-time plugin is one kernel: TensorRT asks for its PTX while it builds the engine, and the engine
then runs without Python or Triton. So each op becomes a chain of plugins in the namespace ``haste``:

    haste::refresh_mask:            token_sums → token_means → drift_gate → group_lse → top_p_select
                                    → count_pairs
    haste::block_sparse_attention:  expand_mask → block_sparse_attention

| file                | what                                                                  |
|---------------------|-----------------------------------------------------------------------|
| ``definitions.py``  | inputs, outputs and launch of each plugin                             |
| ``kernels.py``      | the live kernels with the arguments that TensorRT passes              |
| ``ptx.py``          | their PTX, for the GPU at hand or another                             |
| ``chain.py``        | how plugins make up the ops                                           |
| ``registration.py`` | the plugins in ``tensorrt.plugin``, the converters in torch-tensorrt  |

State is not updated in place: a plugin reads the old state and writes the new one, and the runner keeps two
sets. Kernels that need descriptors made on the host (TMA) take their other form.
"""
