"""Save and load checkpoints. Every backend can load every checkpoint, at every world size.

A checkpoint is a folder, for example ``checkpoints/step_00000100``, with these files:

``rank_00000_weights.safetensors``    pieces of the fp32 master weights, under their canonical names
``rank_00000_moments.safetensors``    the same pieces of the optimizer state, such as AdamW's two moments
``state.json``                        step, samples, loss scale, seed, resolved config, versions
``manifest.json``                     format version, parameter shapes, names of the optimizer tensors,
                                      size and SHA-256 of each file above, SHA-256 of the rest of the manifest

Each rank saves the pieces that it holds, and loads only the elements that it needs. No file contains pickled objects.
"""
