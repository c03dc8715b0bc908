"""Neural ordinary differential equations in PyTorch: a book that runs, and the library it writes."""

from neuralode_nb.ode.base import Solution, SolveError, Status
from neuralode_nb.ode.catalogue import METHODS, Implicit
from neuralode_nb.ode.compat import odeint, odeint_adjoint, odeint_dense, odeint_event
from neuralode_nb.ode.control import PID
from neuralode_nb.ode.events import Event
from neuralode_nb.ode.solve import Adjoint, solve
from neuralode_nb.ode.tableau import Tableau

__version__ = "0.1.0"

__all__ = ["METHODS", "PID", "Adjoint", "Event", "Implicit", "Solution", "SolveError", "Status", "Tableau", "odeint",
           "odeint_adjoint", "odeint_dense", "odeint_event", "solve"]
