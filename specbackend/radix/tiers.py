"""The third tier: blocks of many hosts in a Valkey or Redis server, or a cluster of them."""

import logging
import re
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from specbackend.radix.breaker import CircuitBreaker
from specbackend.radix.cache import BlockCache
from specbackend.radix.index import Block
from specbackend.radix.keys import checksum
from specbackend.radix.worker import BoundedWorker

PREFIX = b"specbackend:kv:"
CHECKSUM = struct.Struct("<Q")  # in front of the payload
TIMEOUT_S = 0.5
KEEP_S = 24 * 3600  # the server's own maxmemory-policy may drop it earlier
BATCH = 8  # blocks in one answer of the server
MOST_WAITING = 64  # texts to write, and as many to fetch; what comes on top is dropped
URL = re.compile("(valkey|redis)(s|-cluster)?://")
CLUSTER = "-cluster://"

log = logging.getLogger(__name__)


class Store(Protocol):
    """Keeps values. Raises for nothing that goes wrong there, and never waits long."""

    num_errors: int

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]: ...

    def put(self, key: bytes, value: bytes) -> None: ...


class ValkeyStore:
    """What fails is a miss, and for a while after that so is everything. For any thread.

    `url` is valkey://HOST:PORT/DB, valkeys:// with TLS, valkey-cluster://HOST:PORT, or the same with redis. Raises
    ValueError for another, and ImportError without redis, the Python package.
    """

    def __init__(self, url: str):
        from redis.exceptions import RedisError

        if not URL.match(url):
            raise ValueError(f"{url!r} is no store: valkey://host:port, valkey-cluster://host:port, ...")
        self._failures = (RedisError, OSError)
        self._url = url.replace("valkey", "redis", 1)
        self._client: Any = None  # made when first needed: a cluster's is not without the cluster
        self._breaker = CircuitBreaker()
        self.num_errors = 0

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        def get_many(client: Any) -> list[bytes | None]:
            many = getattr(client, "mget_nonatomic", client.mget)  # a cluster's keys lie on several nodes
            return many([PREFIX + key for key in keys])

        return self._attempt(get_many) or [None] * len(keys)

    def put(self, key: bytes, value: bytes) -> None:
        self._attempt(lambda client: client.set(PREFIX + key, value, ex=KEEP_S))

    def _attempt(self, action: Callable[[Any], Any]) -> Any:
        if self._breaker.is_open:
            return None
        try:
            self._client = self._client or self._connect()
            result = action(self._client)
        except self._failures as error:
            self.num_errors += 1
            if self._breaker.fail() == 1:
                log.warning("the store fails, and is left alone for a while: %s", type(error).__name__)
            return None
        self._breaker.succeed()
        return result

    def _connect(self) -> Any:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.cluster import RedisCluster
        from redis.retry import Retry

        limits = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S, "retry": Retry(NoBackoff(), 0)}
        if CLUSTER in self._url:
            return RedisCluster.from_url(self._url.replace(CLUSTER, "://"), **limits)
        return Redis.from_url(self._url, **limits)


class StoreTier:
    """Copies blocks to the store once they are published, and back when they are asked for. Two threads of its own."""

    def __init__(self, store: Store, cache: BlockCache):
        self._store, self._cache = store, cache
        self._writer, self._fetcher = (BoundedWorker(name, MOST_WAITING) for name in ("store writes", "store fetches"))
        self._closing = threading.Event()
        self._num_fetched = 0

    def write_behind(self, blocks: Sequence[Block]) -> None:
        self._writer.submit(self._write, [block.key for block in blocks])

    def prefetch(self, keys: Sequence[bytes], num_bytes: int) -> None:
        self._fetcher.submit(self._fetch, list(keys), num_bytes)

    def close(self) -> None:
        """Leave what is not done."""
        self._closing.set()
        self._writer.close()
        self._fetcher.close()

    def stats(self) -> dict[str, int]:
        return {
            "store_errors": self._store.num_errors,
            "store_fetched_blocks": self._num_fetched,
            "store_writes_dropped": self._writer.num_dropped,
            "store_fetches_dropped": self._fetcher.num_dropped,
        }

    def _write(self, keys: list[bytes]) -> None:
        with self._cache.index.holding() as holder:
            for block in self._cache.index.lookup(holder, keys).blocks:
                if self._closing.is_set():
                    return
                if (payload := self._cache.read(block)) is not None:
                    self._store.put(block.key, CHECKSUM.pack(block.checksum) + payload.tobytes())

    def _fetch(self, keys: list[bytes], num_bytes: int) -> None:
        with self._cache.index.holding() as holder:
            known = len(self._cache.index.lookup(holder, keys).blocks)
            for start in range(known, len(keys), BATCH):
                if self._closing.is_set():
                    return
                batch = keys[start : start + BATCH]
                for key, value in zip(batch, self._store.get(batch), strict=True):
                    if value is None or not _is_sound(key, value, num_bytes):
                        return
                    self._cache.publish(holder, key, np.frombuffer(value, np.uint8, offset=CHECKSUM.size))
                    self._num_fetched += 1


def _is_sound(key: bytes, value: bytes, num_bytes: int) -> bool:
    if len(value) != CHECKSUM.size + num_bytes:
        return False
    return CHECKSUM.unpack_from(value)[0] == checksum(key, memoryview(value)[CHECKSUM.size :])
