"""Save portable checkpoints: any backend at any world size can load a checkpoint that another backend saved.

A checkpoint is a folder, for example ``checkpoints/step_00000100``, with these files:

``rank_00000_weights.safetensors``    pieces of the fp32 master weights, under their canonical names
``rank_00000_moments.safetensors``    the corresponding pieces of the optimizer's state, such as AdamW's two moments
``state.json``                        step, samples, loss scale, seed, resolved config, versions
``manifest.json``                     format version, parameter shapes, names of the optimizer's state, size and SHA-256
                                      of each other file, and the SHA-256 of the manifest

Each rank writes the pieces that it holds, without gathering pieces of other ranks. When a rank loads a checkpoint, it
copies only the stored elements that it needs, so no rank ever holds the whole state. No file contains pickled objects.

Three modules save a checkpoint: ``background`` copies the state to host memory and starts a thread, ``saving`` writes
the files, and ``retention`` deletes older checkpoints.
"""
