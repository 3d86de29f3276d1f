"""What the examples share: their arguments, and how a model with a gene is opened."""

from __future__ import annotations

import argparse
from argparse import Namespace

from safegene_edge import SafeLlama

QUESTION = "In one sentence: what is a lighthouse for?"


def local_arguments(about: str | None) -> Namespace:
    """MODEL.gguf [--gene GENE.gguf] [--prompt TEXT] [--max-tokens N]."""
    parser = _parser(about)
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--gene", metavar="GENE.gguf", help="a safety adapter")
    return parser.parse_args()


def server_arguments(about: str | None) -> Namespace:
    """BASE_URL, which ends in /v1, and the rest as above."""
    parser = _parser(about)
    parser.add_argument("base_url", metavar="BASE_URL", help="such as http://127.0.0.1:8080/v1")
    parser.add_argument("--api-key", default="none", help="where the server wants one")
    return parser.parse_args()


def _parser(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=64)
    return parser


def opened(arguments: Namespace) -> SafeLlama:
    """The model with its gene, to be closed by the caller."""
    adapters = [arguments.gene] if arguments.gene else []
    return SafeLlama(arguments.model, adapters)


def model_of(base_url: str, api_key: str) -> str:
    """The name of the model that the server offers."""
    from openai import OpenAI

    with OpenAI(base_url=base_url, api_key=api_key) as client:
        return client.models.list().data[0].id
