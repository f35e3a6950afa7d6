import numpy as np
from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from mmengine.visualization import Visualizer
from PIL import Image

from mmrep.engine import PictureFolder


def picture(red: int) -> np.ndarray:
    image = np.zeros((4, 6, 3), np.uint8)
    image[..., 0] = red
    return image


def test_every_picture_is_kept(tmp_path):
    """Also those of one name, and of one that a number makes."""
    folder = PictureFolder(str(tmp_path / 'new'))
    names = ['a.png', 'a_2', 'a.JPG', 'x/a.png', 'v1.2', '']
    for red, name in enumerate(names):
        folder.add_image(name, picture(red), step=red)
    found = {
        path.name: Image.open(path).getpixel((0, 0))
        for path in (tmp_path / 'new').iterdir()
    }
    assert found == {
        'a.png': (0, 0, 0),
        'a_2.png': (1, 0, 0),
        'a_3.png': (2, 0, 0),
        'a_4.png': (3, 0, 0),
        'v1.2.png': (4, 0, 0),
        'picture.png': (5, 0, 0),
    }


def test_as_the_backend_of_a_visualizer(tmp_path):
    backend = dict(type='mmrep.PictureFolder', save_dir=str(tmp_path))
    assert isinstance(VISBACKENDS.build(backend), PictureFolder)
    visualizer = Visualizer(vis_backends=[backend], save_dir=str(tmp_path / 'other'))
    visualizer.add_image('digit', picture(7), step=3)
    visualizer.add_config(Config())
    visualizer.add_scalar('accuracy', 1.0)
    visualizer.close()
    assert [path.name for path in tmp_path.iterdir()] == ['digit.png']
