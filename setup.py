import os
import runpy
import shutil
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# Build outside the source tree: from a left-over build/, modules that were deleted since
# would get into the next wheel.
SCRATCH = tempfile.TemporaryDirectory(prefix='mmrep-build-')


class BuildPy(build_py):
    """Adds ``mmrep/.mim``, where MIM looks for a package's configs and tools.

    A built package gets copies. An editable install gets symbolic links in the source
    tree, which git ignores, so that an edited config takes effect at once.
    """

    def run(self):
        super().run()
        base = ROOT if self.editable_mode else Path(self.build_lib)
        mim = base / 'mmrep' / '.mim'
        mim.mkdir(parents=True, exist_ok=True)
        for name in ('configs', 'tools', 'model-index.yml'):
            source, target = ROOT / name, mim / name
            if self.editable_mode:
                target.unlink(missing_ok=True)
                target.symlink_to(os.path.relpath(source, mim))
            elif source.is_dir():
                shutil.copytree(
                    source, target, ignore=shutil.ignore_patterns('__pycache__')
                )
            else:
                shutil.copy(source, target)


def requirements(name: str) -> list[str]:
    """Reads ``requirements/{name}.txt`` and what it refers to, without comments."""
    found = []
    for line in (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines():
        line = line.split('#')[0].strip()
        if line.startswith('-r '):
            found += requirements(line.removeprefix('-r ').removesuffix('.txt'))
        elif line:
            found.append(line)
    return found


# mmrep needs mmcv or mmcv-lite or onedl-mmcv, and pip cannot say "or". All install the
# same files, so requiring one could overwrite another that is installed; the same goes for
# mmengine and onedl-mmengine. Hence none is required here: each mmcv brings its mmengine,
# the extra 'lite' is for users without any, and 'all' leaves it out.
extras = {
    name: requirements(name)
    for name in ('lite', 'pretrain', 'seg', 'det', 'onedl', 'onnx', 'keras', 'qat', 'tests')
}
optional = ('pretrain', 'seg', 'det', 'onnx', 'keras')
extras['all'] = list(dict.fromkeys(line for name in optional for line in extras[name]))

setup(
    name='mmrep',
    # Run alone, because importing mmrep needs packages that are not installed yet.
    version=runpy.run_path(str(ROOT / 'mmrep' / 'version.py'))['__version__'],
    description='Structural re-parameterization for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The mmrep authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='computer vision, structural re-parameterization, RepVGG, OpenMMLab',
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=['mmrep', 'mmrep.*']),
    package_data=dict(mmrep=['py.typed']),
    install_requires=requirements('runtime'),
    extras_require=extras,
    entry_points=dict(console_scripts=['mmrep = mmrep.console:main']),
    cmdclass={'build_py': BuildPy},
    options={
        'build': {'build_base': SCRATCH.name},
        'egg_info': {'egg_base': SCRATCH.name},
    },
    zip_safe=False,
)
