"""The contracts: Arrow tables, closed label enumerations, one config model per stage."""
