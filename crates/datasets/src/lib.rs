//! Image data sets: sources, formats, decoding, transforms and the loader.
