"""`verl ui`: a page in the browser over the Python API, for those who do not type. Read `server` first."""
