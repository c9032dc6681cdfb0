"""Arguments and results as leaves and the tree that they hang on."""

from __future__ import annotations

import torch.utils._pytree as pytree

from .probe import require

require("trees")

tree_flatten = pytree.tree_flatten


tree_unflatten = pytree.tree_unflatten


tree_flatten_with_path = pytree.tree_flatten_with_path


keystr = pytree.keystr


TreeSpec = pytree.TreeSpec


treespec_dumps = pytree.treespec_dumps


treespec_loads = pytree.treespec_loads
