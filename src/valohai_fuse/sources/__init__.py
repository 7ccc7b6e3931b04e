"""Where a URL comes from: the manifest, Valohai's API. Adapters behind `ports.UrlSource` and `ports.SizeProbe`."""
