"""Run folders in; tables, statistics and reports out. Imports neither torch nor anything that trains."""
