"""Portable checkpoints: saved by any backend and world size, loaded into any other.

A checkpoint is a folder ``checkpoints/step_00000100``:

``rank_00000_weights.safetensors``    pieces of the fp32 master weights, by canonical name
``rank_00000_moments.safetensors``    the same pieces of AdamW's two moments
``state.json``                        step, samples, loss scale, seed, resolved config, versions
``manifest.json``                     format version, parameter shapes, size and SHA-256 of every file, its own SHA-256

Each rank writes the pieces that it holds; nothing is gathered. Loading copies the overlap of stored pieces and local
ones, so no rank ever holds the whole state. Nothing is pickled.

A save goes through ``background`` (copies to host memory and starts a thread), ``saving`` (writes the files) and
``retention`` (deletes older checkpoints).
"""
