"""The ground floor: the engine, its Python API and the command migician-run. Imports no other folder."""
