"""From a specification of causal linear attention to kernels: Triton tiles, or chunks of ATen. Knows no graphs."""

from .api import linear_attention
from .operator import decompositions
from .spec import Role, Roles, Specification, differentiate

__all__ = ["Role", "Roles", "Specification", "decompositions", "differentiate", "linear_attention"]
