"""Run tasks in this process, on Dask workers or as batch jobs."""
