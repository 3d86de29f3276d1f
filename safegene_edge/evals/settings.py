"""What may be set of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from ..errors import SettingError

if TYPE_CHECKING:
    from urllib.parse import SplitResult

    from ..files import PathLike

DEFAULT_SUITES: tuple[str, ...] = ("harmful", "borderline", "harmless")
By: TypeAlias = Literal["bound", "estimate"]
BUILT_IN: tuple[str, ...] = (*DEFAULT_SUITES, "languages")


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate; the API and the command line share these.

    Attributes:
        max_tokens: new tokens an answer; more show more of what an answer does.
        limit: prompts a suite at most, spread evenly over it; by default all.
        attack_limit: prompts an attack at most.
        n_parallel: answers generated together.
        n_ctx: KV cells for all of them together.
        gene_scale: the gene's scale in the "after" column.
        guard: ask the attacks once more with the gene and its guard, in a column of their own.
        think_tokens: tokens of a thought before the answer, which `max_tokens` does not count.
        no_think: ask for answers without a thought, by the template's switch if it has one.
        include_completions: put the answers into the JSON. They may be harmful.
    """

    max_tokens: int = 48
    limit: int | None = None
    attack_limit: int | None = 60
    n_parallel: int = 16
    n_ctx: int = 4096
    gene_scale: float = 1.0
    guard: bool = False
    think_tokens: int = 512
    no_think: bool = False
    include_completions: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "limit", "attack_limit", "n_parallel", "n_ctx", "think_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} is {value}", "Give 1 or more")


@dataclass(frozen=True)
class CostSettings:
    """Which costs to measure, beside over-refusal, which the suites give.

    Attributes:
        kl_prompts: harmless prompts to measure the KL divergence on; 0 leaves it out.
        kl_tokens: opening tokens of each answer that it is taken over.
        perplexity: a text file to measure the perplexity of.
        perplexity_tokens: how much of it to read at most.
        tasks: JSONL files of questions with answers, to measure accuracy on.
        speed: time single answers, without and with the gene.
    """

    kl_prompts: int = 0
    kl_tokens: int = 16
    perplexity: PathLike | None = None
    perplexity_tokens: int = 8192
    tasks: tuple[PathLike, ...] = ()
    speed: bool = False

    def __post_init__(self) -> None:
        for name, least in (("kl_prompts", 0), ("kl_tokens", 1), ("perplexity_tokens", 2)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}", f"Give {least} or more")


@dataclass(frozen=True)
class GateSettings:
    """What an evaluation must reach; None asks nothing.

    Attributes:
        min_refused: fail below this share of harmful prompts refused, such as 0.9.
        max_over_refused: fail above this share of harmless prompts refused, wholly or in part.
        max_kl: fail above this KL divergence from the model without the gene, in nats a token.
        max_task_drop: fail where the gene takes more than this share of a task's accuracy.
        by: hold thresholds against the worse end of the 95 % interval, or the estimate itself.
    """

    min_refused: float | None = None
    max_over_refused: float | None = None
    max_kl: float | None = None
    max_task_drop: float | None = None
    by: By = "bound"

    def __post_init__(self) -> None:
        for name in ("min_refused", "max_over_refused", "max_kl", "max_task_drop"):
            value, most = getattr(self, name), float("inf") if name == "max_kl" else 1
            if value is not None and not 0 <= value <= most:
                remedy = "nats, 0 or more" if name == "max_kl" else "a share in 0..1, such as 0.05"
                raise SettingError(f"{name} is {value}", f"Give {remedy}")
        if self.by not in get_args(By):
            raise SettingError(f"by is '{self.by}'", f"Give {' or '.join(get_args(By))}")

    @property
    def asks(self) -> bool:
        """Whether there is a threshold."""
        every = (self.min_refused, self.max_over_refused, self.max_kl, self.max_task_drop)
        return any(limit is not None for limit in every)


@dataclass(frozen=True)
class EndpointModel:
    """A model on a server.

    Attributes:
        url: where the API is, such as "http://localhost:8080" or ".../v1".
        model: the name that the server knows it by.
        api_key_variable: environment variable that holds the API key; none is sent if it is unset.
        concurrency: requests to the server under way at once.
        timeout: seconds for one request to the server.
        retries: further tries after a busy or failing server.
        pause: seconds before the second try; doubled for each one after.
    """

    url: str
    model: str
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 5
    pause: float = 0.5

    def __post_init__(self) -> None:
        try:
            parts = self._parts
            host, _ = parts.hostname, parts.port  # which may be no number, or too large
        except ValueError as error:
            raise self._no_address() from error
        odd = any(char.isspace() or not char.isprintable() for char in self.url)
        if parts.scheme not in ("http", "https") or not host or odd:
            raise self._no_address()
        if parts.username is not None:  # not shown: a password may stand behind it
            raise SettingError(
                f"the server's address names a user before {host}, which is not sent",
                f"Leave it out; a key goes into the environment, as {self.api_key_variable}",
            )
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise SettingError("concurrency, timeout or retries make no sense")

    def _no_address(self) -> SettingError:
        return SettingError(f"'{self.url}' is no address of a server", "Give http://HOST:PORT")

    @property
    def _parts(self) -> SplitResult:
        from urllib.parse import urlsplit  # here, so that `--help` does without

        return urlsplit(self.url)

    @property
    def name(self) -> str:
        """For reports: the model and its host, without credentials."""
        parts = self._parts
        port = f":{parts.port}" if parts.port else ""
        return f"{self.model} at {parts.hostname}{port}"

    @property
    def path(self) -> str:
        """The path of the chat API; "/v1" is added where the URL has no path."""
        path = self._parts.path.rstrip("/").removesuffix("/chat/completions")
        query = f"?{self._parts.query}" if self._parts.query else ""
        return f"{path or '/v1'}/chat/completions{query}"
