"""The only room with pyfuse3 and errno: FUSE words in, engine words out."""
