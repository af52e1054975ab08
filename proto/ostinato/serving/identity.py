"""Who calls, and what they may see. The guard finds out; handlers ask `caller()`."""

from __future__ import annotations

import enum
import re
from contextvars import ContextVar
from dataclasses import dataclass

from ostinato.errors import PermissionDenied

TENANT = re.compile(r"(?!#)[!-~]{1,128}")
"""What a tenant may be called: printable ASCII without spaces, and no comment."""


class Role(enum.StrEnum):
    """What an identity is for."""

    TENANT = "tenant"
    """Generates, and sees what is its own."""
    ADMIN = "admin"
    """Sees everything."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller."""

    tenant: str = ""
    role: Role = Role.ADMIN

    @property
    def admin(self) -> bool:
        return self.role is Role.ADMIN

    def may_see(self, tenant: str) -> bool:
        """Whether what belongs to this tenant is shown to the caller."""
        return self.admin or tenant == self.tenant

    def need_admin(self, what: str) -> None:
        """Raises PermissionDenied to all but an admin."""
        if not self.admin:
            raise PermissionDenied(f"{what} is for the role admin, not for tenants")


ANYBODY = Identity()
"""Where there are no credentials: whoever reaches the door."""

CALLER: ContextVar[Identity] = ContextVar("caller", default=ANYBODY)


def caller() -> Identity:
    """Whose call is being handled, in this task."""
    return CALLER.get()
