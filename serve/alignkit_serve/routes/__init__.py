"""The routes, one file a subject. Each route names its scope in its signature."""
