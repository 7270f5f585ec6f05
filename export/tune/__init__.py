"""Tune a checkpoint to the tokens a reducer leaves, as VisionZip and LLaVA-PruMerge do.

The tower and the reducer are frozen, so the tokens of each picture are computed once (`features`).
The projector and, on request, LoRA adapters in the language model learn to read them (`student`,
`training`) from LLaVA-format conversations (`conversations`, `training_text`).
"""
