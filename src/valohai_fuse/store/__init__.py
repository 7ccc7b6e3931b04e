"""The block cache on disk behind `ports.BlockStore`."""
