"""Repairs the CUDA build of torchvision beside a CPU build of torch, and hands on the real package.

Its compiled operators do not load there, and its import then fails on two declarations that are
made here. Must come first on the path.
"""

import importlib.machinery
import importlib.util
import os
import sys

import torch

_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_spec = importlib.machinery.PathFinder.find_spec(
    "torchvision", [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
)
if _spec is None or _spec.loader is None:
    raise ImportError("torchvision is not installed")
_module = importlib.util.module_from_spec(_spec)
vars(_module)["_declared"] = _library  # held: the declarations end with it
sys.modules["torchvision"] = _module
_spec.loader.exec_module(_module)
