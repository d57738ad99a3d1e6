"""Documents in, batches out: `dataset.prepare` packs sources, `loader.Loader` gives batches."""
