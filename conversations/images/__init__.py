"""Images of a conversation: read, counted in tokens, placed in the token sequence.

    sources.py    where an image comes from: file, data URL, bytes, a PIL image, the run's own store
    reading.py    bytes to a `Picture`: the only place that decodes images; limits first
    processor.py  what a model's image processor makes of a size: grid and tokens
    pixels.py     the pixels that a vision tower is given, by transformers' own class
    placing.py    placeholders in rendered ids, expanded; where each image lies
    positions.py  the 3D positions (M-RoPE) of Qwen's vision models

Pillow is imported where it is used: only conversations with images need it.
"""

from __future__ import annotations
