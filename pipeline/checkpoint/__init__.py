"""Save and load checkpoints. Every backend at every world size can load every checkpoint.

A checkpoint is a folder, for example ``checkpoints/step_00000100``, with these files:

``rank_00000_weights.safetensors``    pieces of the fp32 master weights, under their canonical names
``rank_00000_moments.safetensors``    the corresponding pieces of the optimizer state, such as AdamW's two moments
``state.json``                        step, samples, loss scale, seed, resolved config, versions
``manifest.json``                     format version, parameter shapes, names of the optimizer tensors, size and SHA-256
                                      of the files above, and a SHA-256 of the manifest's own entries

When a checkpoint is saved, each rank writes the pieces that it holds. When a checkpoint is loaded, each rank copies
only the elements that it needs. Therefore, the state is never gathered on one rank. No file contains pickled objects.

Three modules save a checkpoint: ``background`` copies the state to host memory and starts a thread. In this thread,
``saving`` writes the files, and ``retention`` deletes older checkpoints.

If a run has a URL, ``mirror`` uploads its checkpoints to the URL. ``remote_run`` defines how they are stored there.
``download`` downloads a checkpoint to continue a run, and ``weights_copy`` copies only the weights. ``pairing`` records
which URLs belong to a run.
"""
