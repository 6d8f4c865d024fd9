"""Matrix products of codes: which formats fit which unit of the processor, and the kernels that multiply them."""
