"""Code of the benchmarks that no one runs directly.

Each program beside this folder takes what it needs from here, and so does `examples.digits.demo`; nothing here imports
a program or an example.

Result files and printing, for all programs:

- `result_files`: the folder of the results, writing them, and what each says of command, machine and versions.
- `terminal`: the console that tables are printed to, and the progress bar.

Bytes and seconds of one training step, for `benchmarks.memory`, `.depth` and `.peers`:

- `strategies`: the ways of doing the step that are compared: plain, checkpointed, rewired and others.
- `step_measurement`: measures every strategy on every model.
- `timm_cases`: a timm model with random images and labels, as a case to measure.
- `step_report`: the table, the JSON document and the picture of what was measured.
- `peer_networks`: the same residual branches as a network of each package that `benchmarks.peers` compares.

All architectures of timm, torchvision and transformers, for `benchmarks.coverage`:

- `coverage_models`: the models of the sweep, and what they are called with.
- `small_transformers`: the transformers models among them, small and with random weights.
- `residual_counter`: counts residual additions from the operators that run, independently of revwire.
- `coverage_report`: the rows of the sweep, its summary, and docs/coverage.md.
"""
