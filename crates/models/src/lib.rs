//! Backbones, pooling heads and their registry.
