"""Heads that the hosts do not have."""

from .auxiliary_cls_head import AuxiliaryClsHead

__all__ = ['AuxiliaryClsHead']
