"""Training: draws, targets, losses, the loop that yields steps, and the state it resumes from."""

from recast.train.aware import Aware
from recast.train.draws import Draw, check, checked, noised, replayed, seeded
from recast.train.ema import Ema
from recast.train.learned import Learned
from recast.train.log import append, log_length, open_log
from recast.train.loop import Step, plainly, rate, train
from recast.train.loss import DISTANCES, HUBERS, Criterion, Distance, Seen, Student, criterion
from recast.train.schedules import SCHEDULES, Schedule, schedule_of, warmup
from recast.train.state import Found, latest, load, restore, save
from recast.train.targets import Answer, Target, Teacher, from_data, from_teacher, guided, mix
from recast.train.team import Team, team
from recast.train.warm import Fit, fit_clock

__all__ = [
    "DISTANCES",
    "HUBERS",
    "SCHEDULES",
    "Answer",
    "Aware",
    "Criterion",
    "Distance",
    "Draw",
    "Ema",
    "Fit",
    "Found",
    "Learned",
    "Schedule",
    "Seen",
    "Step",
    "Student",
    "Target",
    "Teacher",
    "Team",
    "append",
    "check",
    "checked",
    "criterion",
    "fit_clock",
    "from_data",
    "from_teacher",
    "guided",
    "latest",
    "load",
    "log_length",
    "mix",
    "noised",
    "open_log",
    "plainly",
    "rate",
    "replayed",
    "restore",
    "save",
    "schedule_of",
    "seeded",
    "team",
    "train",
    "warmup",
]
