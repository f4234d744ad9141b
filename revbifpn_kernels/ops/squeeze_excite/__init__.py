"""The gates of squeeze-excite, and the gradient of a gated stage."""
