"""Which networks are in memory, and when: all, those in use, or one after the other."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from darkroom_engine.arrays import Array
from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import VAE_DECODER, Manifest
from darkroom_engine.model_control import ModelControl
from darkroom_engine.networks import Networks, WrappedNetworks

LOOK_S = 0.05
"""From one look to the next of somebody who waits until others are idle."""

logger = logging.getLogger(__name__)


class MemoryProfile(StrEnum):
    FULL = "full"
    """All networks stay loaded."""
    BALANCED = "balanced"
    """The denoiser and the VAE decoder stay; others are loaded for as long as they are in use."""
    LOW = "low"
    """One after the other: none is loaded before the one before is gone."""


@dataclass(frozen=True)
class Residence:
    """Which networks stay in memory, and which must not be there together."""

    stays: frozenset[str] = frozenset()
    """Never unloaded."""
    groups: tuple[frozenset[str], ...] = ()
    """Only networks that are in one group are loaded together; without groups, any are."""
    idle_s: float = 5.0
    """What does not stay leaves when it was not called for this time."""
    linger_s: float = 1.0
    """One whose caller may come back is not pushed out before it was idle for this time."""
    min_turn_s: float = 1.0
    """One that is in use is not pushed out before another was waited for at least this long."""

    @classmethod
    def of(cls, profile: MemoryProfile, manifest: Manifest) -> "Residence":
        denoiser = manifest.denoiser.network
        if profile is MemoryProfile.FULL:
            return cls(stays=frozenset(manifest.networks))
        if profile is MemoryProfile.BALANCED:
            return cls(stays=frozenset([denoiser, VAE_DECODER]))
        # Every step calls its ControlNets, and every picture is looked at: one of them at a time
        # would be a change for each call.
        controlnets = manifest.controlnets.values()
        replaced = [variant.get(denoiser, denoiser) for variant in manifest.variants.values()]
        groups = [{name, *controlnets} for name in (denoiser, *replaced)]
        checker = manifest.safety_checker
        groups.append({VAE_DECODER, checker["network"]} if checker else {VAE_DECODER})
        groups += [{name} for name in manifest.networks]
        return cls(groups=tuple(map(frozenset, groups)))

    def exclude(self, one: str, other: str) -> bool:
        """Whether the two must not be loaded together."""
        return bool(self.groups) and not any({one, other} <= group for group in self.groups)


@dataclass
class _Guest:
    """A network that is loaded."""

    since: float
    last_caller: int
    """A thread."""
    last_used: float
    num_calls: int = 0
    """That run now."""
    has_failed: bool = False
    """At the last call."""


@dataclass(frozen=True, eq=False)
class _Waiter:
    """A thread that wants to call a network."""

    network: str
    thread: int
    since: float


class TransientNetworks(WrappedNetworks):
    """Any `Networks`, each of them loaded only while the profile has it so.

    One change at a time: whoever needs a network that is not there makes room, loads it, and calls
    it, before anybody else may push it out; so every change is good for a call at least. A network
    in use is pushed out when its last caller waits or rests, when it is idle, or when the other
    has waited for as long as makes the changes a fifth of the time.
    """

    def __init__(self, networks: Networks, control: ModelControl, residence: Residence) -> None:
        super().__init__(networks)
        self._control = control
        self._residence = residence
        self._changed = threading.Condition()
        self._guests: dict[str, _Guest] = {}
        self._waiting: list[_Waiter] = []
        self._resting: set[int] = set()
        """Threads that have said so since their last call."""
        self._leaving: list[str] = []
        """Those that the change under way unloads: nobody may call them any more."""
        self._is_changing = False
        self._change_s: dict[str, float] = {}
        """How long it last took to bring a network in."""
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-profile", daemon=True)

    def wait_until_ready(
        self, networks: Sequence[str], timeout_s: float, is_given_up: Callable[[], bool]
    ) -> None:
        """Return when networks can be loaded; whether each of them can be shows its first call."""
        self._networks.wait_until_ready((), timeout_s, is_given_up)
        for network in networks:
            # An engine before this one may have left it.
            if network not in self._residence.stays:
                self._control.unload(network)
        self._thread.start()

    def run(self, network: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        with self._loaded(network) as guest:
            if guest.has_failed:
                # Somebody else may have unloaded it; if nobody has, this does nothing.
                self._control.load(network)
            try:
                made = self._networks.run(network, inputs, outputs)
            except NetworkFailed:
                guest.has_failed = True
                raise
            guest.has_failed = False
            return made

    def is_change_due(self) -> bool:
        """Whether what is loaded has been so for long enough that others may come in.

        Those who have more to do than one call ask this before they call for another network.
        """
        if not self._residence.groups:
            return True
        with self._changed:
            now = time.monotonic()
            return all(now - it.since >= self._turn_s(name) for name, it in self._guests.items())

    def rest(self) -> None:
        """The calling thread has no more to do for now: others need not wait for its return."""
        with self._changed:
            self._resting.add(threading.get_ident())
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread; what is loaded stays so."""
        self._is_closed.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextlib.contextmanager
    def _loaded(self, network: str) -> Iterator[_Guest]:
        guest = self._enter(_Waiter(network, threading.get_ident(), time.monotonic()))
        try:
            yield guest
        finally:
            with self._changed:
                guest.num_calls -= 1
                guest.last_used = time.monotonic()
                self._changed.notify_all()

    def _enter(self, me: _Waiter) -> _Guest:
        """Return when the network is loaded and counts one more call."""
        with self._changed:
            self._waiting.append(me)
            self._resting.discard(me.thread)
            # Who waits may be what others wait for.
            self._changed.notify_all()
            try:
                while not self._can_call(me.network) and not self._can_change(me):
                    self._changed.wait(LOOK_S)
                if not self._can_call(me.network):
                    self._change(me)
                guest = self._guests[me.network]
                guest.num_calls += 1
                guest.last_caller = me.thread
                return guest
            finally:
                self._waiting.remove(me)

    def _can_call(self, network: str) -> bool:
        return network in self._guests and network not in self._leaving

    def _can_change(self, me: _Waiter) -> bool:
        if self._is_changing:
            return False
        first = next(it for it in self._waiting if it.network not in self._guests)
        return first is me and all(
            self._gives_way(name, me) for name in self._in_the_way(me.network)
        )

    def _in_the_way(self, network: str) -> list[str]:
        return [name for name in self._guests if self._residence.exclude(network, name)]

    def _gives_way(self, network: str, waiter: _Waiter) -> bool:
        guest, now = self._guests[network], time.monotonic()
        if not guest.num_calls:
            if now - guest.last_used >= self._residence.linger_s:
                return True
            if guest.last_caller in self._resting | {it.thread for it in self._waiting}:
                return True
        return now - waiter.since >= self._turn_s(network, waiter.network)

    def _turn_s(self, *networks: str) -> float:
        """How long the one is left alone for the other: four times what it takes to change."""
        change_s = sum(self._change_s.get(name, 0.0) for name in networks)
        return max(self._residence.min_turn_s, 4 * change_s)

    def _change(self, me: _Waiter) -> None:
        """Load the network, after those that are in its way are gone."""
        start = time.monotonic()
        with self._changing(self._in_the_way(me.network)):
            self._control.load(me.network)
        now = time.monotonic()
        self._change_s[me.network] = now - start
        self._guests[me.network] = _Guest(since=now, last_caller=me.thread, last_used=now)
        logger.info("%s is loaded, %.1f s", me.network, now - start)

    @contextlib.contextmanager
    def _changing(self, leaving: list[str]) -> Iterator[None]:
        """Unload these, and run the block without the lock, which is held before and after."""
        self._is_changing, self._leaving = True, leaving
        try:
            self._changed.wait_for(lambda: not any(self._guests[it].num_calls for it in leaving))
            self._changed.release()
            try:
                for network in leaving:
                    self._control.unload(network)
                    with self._changed:
                        self._guests.pop(network)
                    logger.info("%s is unloaded", network)
                yield
            finally:
                self._changed.acquire()
        finally:
            self._is_changing, self._leaving = False, []
            self._changed.notify_all()

    def _run(self) -> None:
        """Unload what is idle."""
        while not self._is_closed.wait(self._residence.idle_s / 4):
            with self._changed:
                idle = [] if self._is_changing else self._idle()
                if not idle:
                    continue
                try:
                    with self._changing(idle):
                        pass
                except NetworkFailed as error:
                    logger.warning("%s", error)

    def _idle(self) -> list[str]:
        now, wanted = time.monotonic(), {it.network for it in self._waiting}
        return [
            name
            for name, guest in self._guests.items()
            if name not in self._residence.stays | wanted
            and not guest.num_calls
            and now - guest.last_used >= self._residence.idle_s
        ]
