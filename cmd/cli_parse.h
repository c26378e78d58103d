/* Values that are written in one word on the command line: token lists, the sparse mode, SLOs,
 * mixes.
 * Errors name what is wrong and where. */
#ifndef CMD_CLI_PARSE_H
#define CMD_CLI_PARSE_H

#include "cmd/cli_load.h"
#include "cmd/cli_report.h"
#include "core/err.h"
#include "ipc/client.h"

#include <stdint.h>

struct cli_tokens {
    int32_t *ids;
    int32_t n;
};

/* "1,2,3", or "@FILE": ids separated by commas, blanks or newlines (brackets are skipped, so a JSON
 * array is fine), or JSON lines, of which line `line` (from 1) is taken and its "prompt" or
 * "tokens" read. "@-" is standard input. Free ids with mem_free. */
MUST_CHECK int cli_parse_tokens(struct cli_tokens *out, const char *text, int64_t line,
                                struct err_msg *why);
/* At most max ids, "1,2,3"; "" or NULL is none. Returns their number. */
MUST_CHECK int cli_parse_ids(int32_t *out, int max, const char *text, struct err_msg *why);
/* dense | k=K or abs:K | rel=LAMBDA or rel:LN, its logarithm | abs~D or rel~D, a density | auto,
 * each with "+decode~D" behind it or not: sets sparse, k, ln_lambda, density, decode_density. */
MUST_CHECK int cli_parse_sparse(struct sluice_request *r, const char *text, struct err_msg *why);
/* The same with "/ROWS" for gate_rows and "@ADDRESS" for a daemon of its own, all optional, in this
 * order: rel:-0.001/64+decode~0.25@unix:/tmp/other.sock. *address points into text, or is NULL. */
MUST_CHECK int cli_parse_policy(struct sluice_request *r, const char **address, const char *text,
                                struct err_msg *why);
/* At most max whole numbers above 0 between commas, "8192,16k" (times 1024); returns their number.
 */
MUST_CHECK int cli_parse_lengths(int32_t *out, int max, const char *text, struct err_msg *why);
/* "ttft:500,tpot:50,e2el:2000", milliseconds. */
MUST_CHECK int cli_parse_goodput(struct report_slo *out, const char *text, struct err_msg *why);
/* "131072:128:4,1024:128:60", prompt:output:count; returns the number of classes. */
MUST_CHECK int cli_parse_mix(struct load_class *out, int max, const char *text,
                             struct err_msg *why);
/* "50,90,99.9"; returns their number. */
MUST_CHECK int cli_parse_percentiles(double *out, int max, const char *text, struct err_msg *why);

#endif
