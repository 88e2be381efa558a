"""`qlora-kit doctor`: is this machine ready?"""

from qlora_kit.core.errors import EXIT_OK, EXIT_RUN_FAILED

HELP = """usage: qlora-kit doctor

Checks Python, packages, devices and write access; exit code 1 when something needed is missing."""


def run(arguments: list[str]) -> int:
    """Print the findings; returns the exit code."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP)
        return EXIT_OK
    from qlora_kit.pipelines.diagnose import Health, diagnose
    from qlora_kit.report.table import print_table

    findings = diagnose()
    rows = [(finding.name, finding.health.value, finding.value, finding.fix) for finding in findings]
    print_table("qlora-kit doctor", ("what", "state", "found", "fix"), rows)
    return EXIT_RUN_FAILED if any(finding.health is Health.bad for finding in findings) else EXIT_OK
