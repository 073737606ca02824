"""Which modules an adapter changes, and which it trains whole.

| module | subject |
|---|---|
| `base_parameters` | the parameters of the base model, of which a budget is a share |
| `default_targets` | the modules that are adapted by default |
| `supported_kinds` | whether a model has any of them |
| `target_parameters` | the parameters that are adapted although no layer owns them, such as all experts of a block |
| `target_checks` | what is checked of an adapter's name and of its targets |
| `obstacle` | what keeps a module or a weight from being adapted |
| `past_adapters` | targets that a model may use past an adapter |
| `tied_weights` | modules that share the weight of a targeted embedding |
| `inert_biases` | biases that cannot change the output |
| `left_out` | large weights that an adapter leaves as they are, and why |
| `whole_modules`, `whole_checks` | modules that are trained and saved whole, such as the head |
"""
