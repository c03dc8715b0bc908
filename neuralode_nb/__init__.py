"""Neural ordinary differential equations in PyTorch: a book that runs, and the library it writes."""

from neuralode_nb.ode.base import Solution, SolveError, Status
from neuralode_nb.ode.catalogue import METHODS, Implicit
from neuralode_nb.ode.certify import check_gradient
from neuralode_nb.ode.compat import odeint, odeint_adjoint, odeint_dense, odeint_event
from neuralode_nb.ode.control import PID
from neuralode_nb.ode.events import Event
from neuralode_nb.ode.schedules import Checkpoint
from neuralode_nb.ode.solve import solve
from neuralode_nb.ode.tableau import Tableau
from neuralode_nb.ode.ways import Adjoint

__version__ = "0.1.0"

__all__ = ["METHODS", "PID", "Adjoint", "Checkpoint", "Event", "Implicit", "Solution", "SolveError", "Status", "Tableau",
           "check_gradient", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event", "solve"]
