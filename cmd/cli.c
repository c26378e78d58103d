/* sluice: the client of the daemon and the tools around it. `sluice COMMAND --help` tells the rest.
 * Exit codes: enum cli_exit. */
#include "cmd/cli.h"

#include "core/mem.h"

#include <stdio.h>
#include <string.h>

static const struct cli_command *const commands[] = {
    &cli_generate, &cli_bench, &cli_eval,     &cli_stats,
    &cli_health,   &cli_drain, &cli_shutdown, &cli_reset_prefix_cache};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void help(FILE *to)
{
    (void)fputs("usage: sluice COMMAND [options]\n\nClient of the Sluice inference daemon. "
                "Commands (each has its own --help):\n",
                to);
    for (int i = 0; i < N_COMMANDS; i++)
        (void)fprintf(to, "  %-20s %s\n", commands[i]->name, commands[i]->program->summary);
    (void)fputs("\nExit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 cannot connect or the "
                "connection was lost.\n",
                to);
}

/* The README's option reference. */
static void markdown(void)
{
    for (int i = 0; i < N_COMMANDS; i++) {
        const struct conf_program *p = commands[i]->program;
        (void)printf("#### `%s`\n\n%s\n\n", p->usage, p->summary);
        conf_markdown(p, stdout);
        (void)putchar('\n');
    }
}

static int run(const struct cli_command *cmd, int argc, char **argv)
{
    struct err_msg why = {""};
    if (conf_wants_help(argc, argv)) {
        conf_help(cmd->program, stdout);
        return CLI_OK;
    }
    void *options = mem_zalloc(1, cmd->options_size);
    conf_defaults(cmd->program, options);
    int code = CLI_USAGE;
    if (conf_args(cmd->program, options, argc, argv, NULL, 0, NULL, &why) < 0)
        (void)cli_fail(0, "%s: %s", cmd->name, why.text);
    else
        code = cmd->run(options);
    conf_free(cmd->program, options);
    mem_free(options);
    return code;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        help(stderr);
        return CLI_USAGE;
    }
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i]->name) == 0)
            return run(commands[i], argc - 1, argv + 1);
    }
    if (strcmp(argv[1], "--version") == 0) {
        (void)puts("sluice " SLUICE_VERSION);
        return CLI_OK;
    }
    if (strcmp(argv[1], "--help-markdown") == 0) {
        markdown();
        return CLI_OK;
    }
    if (conf_wants_help(argc, argv) || strcmp(argv[1], "help") == 0) {
        help(stdout);
        return CLI_OK;
    }
    return cli_fail(CLI_USAGE, "unknown command '%s' (see sluice --help)", argv[1]);
}
