/* The demo's judgement and its prompt file; the demo as a program is in test_programs.c. */
#include "tests/test.h"

#include "cmd/demo_plan.h"
#include "cmd/demo_print.h"

#include <unistd.h>

static void answers_are_judged_as_ruler_does(void **state)
{
    (void)state;
    int32_t want[] = {10, 11, 5, 10, 4, 12, 13, 2}, first[] = {10, 11}, second[] = {12, 13};
    struct demo_prompt p = {.expected = {want, 8}, .refs = {{first, 2}, {second, 2}}, .n_refs = 2};
    static const struct {
        int32_t answer[12];
        int32_t n;
        double score;
        bool exact;
    } cases[] = {
        {{10, 11, 5, 10, 4, 12, 13, 2}, 8, 1.0, true},
        {{10, 11, 5, 10, 4, 12, 13}, 7, 1.0, true},         /* EOS is not asked for */
        {{10, 11, 5, 10, 4, 12, 13, 99, 98}, 9, 1.0, true}, /* nor what comes after */
        {{10, 11, 5, 10, 4, 12, 14, 2}, 8, 0.5, false},
        {{12, 13, 5, 10, 11, 2}, 6, 1.0, false},            /* both are there, in another order */
        {{10, 5, 11, 12, 2, 13}, 6, 0.0, false},            /* not contiguous */
        {{2, 10, 11, 12, 13}, 5, 0.0, false},               /* cut at EOS */
        {{1, 1, 1, 1, 1, 1, 1, 1, 10, 11}, 10, 0.0, false}, /* cut at the expected length */
        {{0}, 0, 0.0, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bool exact;
        double score = demo_score(&p, cases[i].answer, cases[i].n, &exact);
        if (exact != cases[i].exact || score < cases[i].score || score > cases[i].score)
            fail_msg("case %zu: score %g exact %d", i, score, exact);
    }
}

static void the_cast_fits_the_prompts_that_ship(void **state)
{
    (void)state;
    struct demo_prompt p[DEMO_USERS];
    struct err_msg why = {""};
    bool leaves = false, exact;
    if (demo_prompts_load(p, TEST_ROOT "/models/needle/prompts.jsonl", &why) < 0)
        fail_msg("%s", why.text);
    for (int u = 0; u < DEMO_USERS; u++) {
        const struct demo_user *d = &demo_users[u];
        assert_true(d->after < u); /* everybody waits for somebody who has come before */
        assert_in_range(p[u].prompt.n, 800, 16384);
        assert_close(demo_score(&p[u], p[u].expected.ids, p[u].expected.n, &exact), 1, 0, 0);
        assert_true(exact);
        leaves |= d->leaves_at > 0 && d->leaves_at < 1;
        if (d->after_prefix)
            assert_true(demo_shared_prefix(&p[u], &p[d->after]) >= 4096);
    }
    assert_true(leaves);
    assert_true(p[DEMO_USERS - 1].prompt.n <= 4096); /* the last one is short */
    demo_prompts_free(p);
}

static void bad_prompt_files_are_refused(void **state)
{
    (void)state;
    static const char good[] =
        "{\"task\":\"t\",\"prompt\":[1],\"expected\":[5,2],\"refs\":[[5]]}\n";
    static const struct {
        const char *line, *names;
    } bad[] = {
        {"{", "f:2"},
        {"{\"task\":\"t\",\"prompt\":[],\"expected\":[5,2],\"refs\":[[5]]}\n", "prompt"},
        {"{\"task\":\"t\",\"prompt\":[-1],\"expected\":[5,2],\"refs\":[[5]]}\n", "prompt"},
        {"{\"task\":\"t\",\"prompt\":[1],\"expected\":\"x\",\"refs\":[[5]]}\n", "expected"},
        {"{\"task\":\"t\",\"prompt\":[1],\"expected\":[5,2],\"refs\":[]}\n", "refs"},
        {"{\"prompt\":[1],\"expected\":[5,2],\"refs\":[[5]]}\n", "task"},
        {"", "8 users"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char folder[] = "/tmp/sluice-test-XXXXXX", path[64];
        struct demo_prompt p[DEMO_USERS];
        struct err_msg why = {""};
        assert_non_null(mkdtemp(folder));
        (void)snprintf(path, sizeof path, "%s/f", folder);
        FILE *f = fopen(path, "we");
        assert_non_null(f);
        (void)fprintf(f, "%s%s", good, bad[i].line);
        (void)fclose(f);
        assert_true(demo_prompts_load(p, path, &why) < 0);
        if (!strstr(why.text, bad[i].names))
            fail_msg("case %zu: '%s' does not name %s", i, why.text, bad[i].names);
        (void)unlink(path);
        (void)rmdir(folder);
    }
}

static void problems_are_counted(void **state)
{
    (void)state;
    struct demo_mode mode = {.name = "dense"};
    struct demo_round r = {.leaked = false};
    FILE *to = fopen("/dev/null", "we");
    assert_non_null(to);
    for (int u = 0; u < DEMO_USERS; u++) {
        r.users[u].state = demo_users[u].leaves_at > 0 ? DEMO_LEFT : DEMO_ANSWERED;
        r.users[u].exact = true;
    }
    assert_int_equal(demo_problems(&mode, &r, true, to), 0);
    r.users[0].exact = false;
    assert_int_equal(demo_problems(&mode, &r, false, to), 0); /* a gated answer may be wrong */
    assert_int_equal(demo_problems(&mode, &r, true, to), 1);
    r.users[1].state = DEMO_BROKEN;
    r.leaked = true;
    r.after.errors = 2;
    assert_int_equal(demo_problems(&mode, &r, true, to), 4);
    (void)fclose(to);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(answers_are_judged_as_ruler_does),
        cmocka_unit_test(the_cast_fits_the_prompts_that_ship),
        cmocka_unit_test(bad_prompt_files_are_refused),
        cmocka_unit_test(problems_are_counted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
