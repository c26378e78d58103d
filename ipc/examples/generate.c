/* Smallest useful client: generate ADDRESS MAX_TOKENS ID [ID ...]
 * Sends the token ids as a prompt, prints the generated ids as they come, then what it cost.
 * Build: cc generate.c -lsluice_client -lmsgpackc */
#include "ipc/client.h" /* installed: <sluice/client.h> */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static int finish(const struct sluice_event *e)
{
    if (e->type == SLUICE_FAILED) {
        (void)fprintf(stderr, "\n%s: %s\n", sluice_code_name(e->u.error.code), e->u.error.message);
        return 1;
    }
    (void)printf("\n%s: %" PRId32 " prompt tokens (%" PRId32 " cached), %" PRId32
                 " generated, first after %.1f ms\n",
                 sluice_reason_name(e->u.done.reason), e->u.done.prompt_tokens,
                 e->u.done.cached_tokens, e->u.done.completion_tokens,
                 (double)e->u.done.ttft_us / 1000);
    return 0;
}

static int generate(struct sluice_client *c, const struct sluice_request *r)
{
    struct sluice_event e;
    if (sluice_submit(c, r) < 0) {
        (void)fprintf(stderr, "%s\n", sluice_error(c));
        return 1;
    }
    while (sluice_next(c, &e, -1) > 0) {
        if (e.type == SLUICE_TOKENS)
            for (int32_t i = 0; i < e.u.tokens.n; i++)
                (void)printf("%" PRId32 " ", e.u.tokens.ids[i]);
        (void)fflush(stdout);
        if (sluice_event_is_last(&e))
            return finish(&e);
    }
    (void)fprintf(stderr, "%s\n", sluice_error(c));
    return 1;
}

int main(int argc, char **argv)
{
    struct sluice_client *c;
    struct sluice_request r;
    char why[256];
    if (argc < 4) {
        (void)fprintf(stderr, "usage: %s ADDRESS MAX_TOKENS ID [ID ...]\n", argv[0]);
        return 2;
    }
    int32_t *prompt = malloc((size_t)(argc - 3) * sizeof *prompt);
    if (!prompt)
        return 1;
    for (int i = 3; i < argc; i++)
        prompt[i - 3] = (int32_t)strtol(argv[i], NULL, 10);
    if (sluice_connect(&c, argv[1], NULL, why, sizeof why) < 0) {
        (void)fprintf(stderr, "%s\n", why);
        free(prompt);
        return 1;
    }
    sluice_request_init(&r);
    r.id = "1";
    r.tokens = prompt;
    r.n_tokens = argc - 3;
    r.max_tokens = (int32_t)strtol(argv[2], NULL, 10);
    r.temperature = 0;
    int rc = generate(c, &r);
    sluice_close(c);
    free(prompt);
    return rc;
}
