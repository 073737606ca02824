"""One module per row of the benchmark; each has `measure(workload)`, which returns a `Row`."""
