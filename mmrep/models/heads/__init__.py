"""Heads that hosts have none of."""

from .auxiliary_cls_head import AuxiliaryClsHead

__all__ = ['AuxiliaryClsHead']
