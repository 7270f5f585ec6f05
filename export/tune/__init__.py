"""Tuning a checkpoint to the tokens a reducer leaves, as VisionZip and LLaVA-PruMerge do.

The tower and the reducer are frozen, so what the reducer leaves of a picture is computed once
(`features`); the projector, and on request LoRA adapters in the language model, learn to read it
(`student`, `training`) from LLaVA-format conversations (`conversations`, `training_text`).
`export.tune` is the command.
"""
