"""Making linear layers semi-sparse and dense again, in place.

swap: sparsify. densify: the way back. torchao: torchao's two functions. selection, roles: which layers are meant.
named: settings by name. refusals: may a layer be swapped; source/: what the modules' source does with its weight.
report: what was done. coverage: what lies outside nn.Linear. masked_weights, sharing: writing pruned weights, and what
shares their memory. conv1d, transpose: GPT-2's Conv1D as nn.Linear. layers: the semi-sparse layers of a model.
"""
