"""V1's ``Config``: how many SMs a call uses, and how many bytes a program gives a buffer."""

from __future__ import annotations

from crossdock.compat.deep_ep import sizes
from crossdock.errors import ConfigError

_MAX_INTRANODE = 8
"""Ranks up to which V1's programs give no bytes for RDMA."""


class Config:
    """How a normal call moves rows. Of all these numbers Crossdock needs one: rows are in no chunks, so none are sized.

    Args:
        num_sms: SMs that its kernels may use, an even number. CPUs have none, and take any.
        num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens, num_max_rdma_chunked_send_tokens,
        num_max_rdma_chunked_recv_tokens: rows that another library sends at a time, and has room for; checked as
            there, and used in the hints alone.

    Raises:
        ConfigError: ``num_sms`` is odd or not positive, or a send chunk is not below its receive chunk.
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        check_sms(num_sms)
        for link, send, recv in (
            ("nvl", num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens),
            ("rdma", num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens),
        ):
            if not 0 < send < recv:
                raise ConfigError(
                    f"num_max_{link}_chunked_send_tokens={send}, num_max_{link}_chunked_recv_tokens={recv}; pass a "
                    f"positive send chunk below the receive chunk, or leave both out: Crossdock needs none"
                )
        self._num_sms = num_sms
        self._num_tokens = num_sms // 2 * num_max_nvl_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for normal calls of as many tokens as this has chunks for; calls of more make room when they come."""
        return sizes.normal(self._num_tokens, max(1, hidden_bytes // 2), num_ranks)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0 up to 8 ranks; beyond, where programs expect some, what ``get_nvl_buffer_size_hint`` says."""
        return 0 if num_ranks <= _MAX_INTRANODE else self.get_nvl_buffer_size_hint(hidden_bytes, num_ranks)


def sms_of(config: Config | None) -> int | None:
    """SMs that a call is to use; None: nobody has said."""
    return None if config is None else config._num_sms  # noqa: SLF001 - DeepEP's has no readable fields, so nor has this


def check_sms(num_sms: object) -> None:
    """Raises ConfigError unless it is a positive even number."""
    if not isinstance(num_sms, int) or num_sms < 2 or num_sms % 2:
        raise ConfigError(f"num_sms={num_sms!r}; pass an even number of SMs, 2 or more")
