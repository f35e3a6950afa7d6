"""The registries of mmrep, children of mmengine's.

``type='mmrep.RepVGG'`` in a config of any OpenMMLab package makes mmengine import this
file and then the ``locations``. mmengine hides an ``ImportError`` of this file, so nothing
but mmengine is imported here.
"""

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import VISBACKENDS as MMENGINE_VISBACKENDS
from mmengine.registry import WEIGHT_INITIALIZERS as MMENGINE_WEIGHT_INITIALIZERS
from mmengine.registry import Registry

SCOPE = 'mmrep'

# For `_base_ = 'mmrep::…'`. mmengine does not find the folder of an editable install by the
# package's name, but by that of a module in it.
MODULE2PACKAGE[SCOPE] = f'{SCOPE}.version'

#: Backbones, blocks and layers.
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope=SCOPE,
    locations=['mmrep.models', 'mmrep.expansion'],
)
#: Hooks of the training and testing loops.
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope=SCOPE, locations=['mmrep.engine'])
#: Constructors of optimizer wrappers.
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope=SCOPE,
    locations=['mmrep.engine'],
)
#: Where a visualizer writes.
VISBACKENDS = Registry(
    'vis_backend', parent=MMENGINE_VISBACKENDS, scope=SCOPE, locations=['mmrep.engine']
)
#: What an ``init_cfg`` can name.
WEIGHT_INITIALIZERS = Registry(
    'weight initializer',
    parent=MMENGINE_WEIGHT_INITIALIZERS,
    scope=SCOPE,
    locations=['mmrep.engine'],
)


def share_names() -> None:
    """Make the names resolve without ``mmrep.`` in every OpenMMLab scope.

    Everything in the registries above is also registered with mmengine's root registries,
    where a package looks for names that its own registry lacks. A name that the root
    registry or a package has already, as mmpretrain's ``RepVGG``, keeps its meaning.
    """
    registries = (
        MODELS,
        HOOKS,
        OPTIM_WRAPPER_CONSTRUCTORS,
        VISBACKENDS,
        WEIGHT_INITIALIZERS,
    )
    for registry in registries:
        for name, module in registry.module_dict.items():
            if name not in registry.parent.module_dict:
                registry.parent.register_module(name=name, module=module)
