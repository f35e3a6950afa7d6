"""A visualizer's backend that writes each picture into one folder."""

from pathlib import Path
from typing import Any

import numpy as np
from mmcv.image import imwrite
from mmengine.visualization.vis_backend import BaseVisBackend

from mmrep.registry import VISBACKENDS

#: Of image files, in lower case.
_ENDINGS = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


@VISBACKENDS.register_module()
class PictureFolder(BaseVisBackend):
    """Write each picture as ``save_dir/NAME.png``; if a name repeats, a number is added.

    Names repeat in test sets with a folder for each class. Existing files are replaced.

    Args:
        save_dir (str): The folder; it is made with the first picture.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir)
        #: The names written, each with the last number that was added to it.
        self._written: dict[str, int] = {}

    def _init_env(self) -> None:
        """Nothing to prepare: the folder is made with the first picture."""

    @property
    def experiment(self) -> 'PictureFolder':
        """This backend."""
        return self

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **_: Any) -> None:
        """Write a picture.

        Args:
            name (str): Its name, in which the ending of an image file is left out.
            image (np.ndarray): The picture ``(H, W, 3)`` in RGB.
            step (int): Not used: there is one test.
        """
        path = Path(name)
        is_image = path.suffix.lower() in _ENDINGS
        stem = unique = (path.stem if is_image else path.name) or 'picture'
        while unique in self._written:
            self._written[stem] += 1
            unique = f'{stem}_{self._written[stem]}'
        self._written[unique] = 1
        path = Path(self._save_dir, f'{unique}.png')
        imwrite(np.ascontiguousarray(image[..., ::-1]), str(path))
