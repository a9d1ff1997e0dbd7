"""Pipeline parallelism: a schedule is data (planners.schedules); this folder carries it out."""
