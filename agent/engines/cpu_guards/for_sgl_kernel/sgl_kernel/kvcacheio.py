"""Stands in for `sgl_kernel.kvcacheio`: any name can be imported, none can be called."""

from sgl_kernel import __getattr__ as __getattr__
