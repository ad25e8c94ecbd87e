package tokens

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// queueWorkers bounds the background jobs that run at the same time.
	queueWorkers = 8
	// maxAsking bounds the workers that ask WeChat what the gateway can do without: while WeChat hangs, each is at it for as long as a job may take.
	maxAsking = queueWorkers / 2
	// jobTimeout bounds one attempt of a job.
	jobTimeout = renewTimeout
)

// A job is background work that is repeated, with a growing pause, until it returns nil.
type job struct {
	run     func(context.Context) error
	due     time.Time
	failed  int       // attempts in a row
	running bool      // at most once at a time
	again   bool      // added again while running
	sooner  time.Time // when it is to run again, as it was hastened while running
	light   bool
	asks    bool         // WeChat, and may as well not be done
	lane    lane         // see addIn
	number  uint64       // of its last attempt
	err     error        // what that came to
	awaited []chan error // get what the attempt that is under way, or else the next, comes to
}

// maxLight bounds the jobs that may as well not be done: what wanted one asks again.
const maxLight = 256

// retryError makes a job run again after a pause of its own choosing.
type retryError struct {
	after time.Duration
}

func (retryError) Error() string { return "to be repeated" }

// retryQueue holds the jobs by id. It is small: intents under way, tickets awaited, and what waits for the store.
type retryQueue struct {
	mu   sync.Mutex
	jobs map[string]*job
	wake chan struct{}
	free chan struct{} // one element per idle worker

	light  int           // jobs that addLight and addNews added
	asking int           // of addLight's, that run
	lanes  map[lane]bool // in which one runs
	tries  uint64        // attempts that have begun; each has its number
}

func (q *retryQueue) init() {
	q.jobs = make(map[string]*job)
	q.lanes = make(map[lane]bool)
	q.wake = make(chan struct{}, 1)
	q.free = make(chan struct{}, queueWorkers)
	for range queueWorkers {
		q.free <- struct{}{}
	}
}

// add queues a job to run after a delay. One that waits under the same id stays; one that is running runs once more.
func (q *retryQueue) add(id string, delay time.Duration, run func(context.Context) error) {
	q.put(id, delay, &job{run: run})
}

// A lane is of jobs that run one after another. There may be many, or they may take minutes: they leave the other workers to other work.
type lane string

const (
	laneForwards       lane = "forwards"        // hand on events: while backends hang, for minutes
	laneForwardRecords lane = "forward records" // are about one event in a store, which may be one that is used no more: as many as there are events
)

// addIn is add for a job of a lane.
func (q *retryQueue) addIn(in lane, id string, delay time.Duration, run func(context.Context) error) {
	q.put(id, delay, &job{run: run, lane: in})
}

func (q *retryQueue) put(id string, delay time.Duration, next *job) {
	q.mu.Lock()
	if j := q.jobs[id]; j == nil {
		next.due = time.Now().Add(delay)
		q.jobs[id] = next
	} else if j.running {
		j.again = true
	}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// addLight queues a job that is done once and asks WeChat, unless it is queued already or too many are, and reports whether it did. Few of
// them run at the same time.
func (q *retryQueue) addLight(id string, run func(context.Context)) (queued bool) {
	return q.addOnce(id, run, false)
}

// addNews queues a job that is done once and reads what has just changed, unless too many are queued: one that is running, and may have read
// it as it was before, runs once more.
func (q *retryQueue) addNews(id string, run func(context.Context)) { q.addOnce(id, run, true) }

func (q *retryQueue) addOnce(id string, run func(context.Context), news bool) (queued bool) {
	q.mu.Lock()
	switch j := q.jobs[id]; {
	case j != nil:
		j.again = j.again || news && j.running
	case q.light < maxLight:
		q.light++
		q.jobs[id] = &job{light: true, asks: !news, due: time.Now(), run: func(ctx context.Context) error { run(ctx); return nil }}
		queued = true
	}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return queued
}

// hasten makes a waiting job due now, unless it waits because it failed, and one that is running once it is to wait.
func (q *retryQueue) hasten(id string) { q.hastenTo(id, time.Now()) }

// hastenTo is hasten to a time.
func (q *retryQueue) hastenTo(id string, due time.Time) {
	q.mu.Lock()
	switch j := q.jobs[id]; {
	case j == nil:
	case j.running:
		if j.sooner.IsZero() || due.Before(j.sooner) { // it may have looked before there was what it is hastened for
			j.sooner = due
		}
	case j.failed == 0 && due.Before(j.due):
		j.due = due
	}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// attempt is one attempt of a job that somebody waits for.
type attempt struct {
	id    string
	ended chan error // gets one
}

// tried is the number of the last attempt that has begun.
func (q *retryQueue) tried() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.tries
}

// tryNow makes all jobs due now whose ids have a prefix, also those that wait because they failed, and returns their
// attempts, or those that are under way, or were begun since the one of that number.
func (q *retryQueue) tryNow(prefix string, since uint64) (attempts []attempt) {
	q.mu.Lock()
	for id, j := range q.jobs {
		if !strings.HasPrefix(id, prefix) {
			continue
		}
		a := attempt{id, make(chan error, 1)}
		attempts = append(attempts, a)
		if !j.running && j.number > since {
			a.ended <- j.err
			continue
		}
		j.awaited = append(j.awaited, a.ended)
		if !j.running {
			j.due = time.Now()
		}
	}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	slices.SortFunc(attempts, func(a, b attempt) int { return strings.Compare(a.id, b.id) })
	return attempts
}

// take returns a job that is due, marked as running, or else how long until the next one is; negative: none.
func (q *retryQueue) take() (id string, j *job, wait time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	wait = -1
	now := time.Now()
	for name, candidate := range q.jobs {
		if candidate.running || candidate.asks && q.asking == maxAsking || q.lanes[candidate.lane] { // the end of one that runs wakes the loop
			continue
		}
		left := candidate.due.Sub(now)
		if left <= 0 {
			q.tries++
			candidate.running, candidate.number = true, q.tries
			if candidate.asks {
				q.asking++
			}
			if candidate.lane != "" {
				q.lanes[candidate.lane] = true
			}
			return name, candidate, 0
		}
		if wait < 0 || left < wait {
			wait = left
		}
	}
	return "", nil, wait
}

// finish removes a job that is done, and plans the next attempt of one that is not.
func (q *retryQueue) finish(id string, j *job, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	j.running, j.err = false, err
	if j.asks {
		q.asking--
	}
	delete(q.lanes, j.lane)
	for _, ended := range j.awaited {
		ended <- err
	}
	j.awaited = nil
	retry, chosen := err.(retryError)
	if j.light {
		err = nil // also after a panic
	}
	switch {
	case err != nil && j.again: // there may be news; but no faster than after a first failure
		j.failed, j.due = 1, time.Now().Add(backoff(1))
	case chosen:
		j.failed, j.due = 0, time.Now().Add(retry.after)
		if !j.sooner.IsZero() && j.sooner.Before(j.due) {
			j.due = j.sooner
		}
	case err != nil:
		j.failed++
		j.due = time.Now().Add(backoff(j.failed))
	case j.again:
		j.failed, j.due = 0, time.Now()
	default:
		delete(q.jobs, id)
		if j.light {
			q.light--
		}
	}
	j.again, j.sooner = false, time.Time{}
}

// runQueue is the manager's background loop. It owns the timer, and starts at most queueWorkers jobs at a time.
func (m *Manager) runQueue(ctx context.Context) {
	q := &m.queue
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-q.free:
		case <-ctx.Done():
			return
		}
		id, j, wait := q.take()
		if j != nil {
			m.startJob(id, j)
			continue
		}
		q.free <- struct{}{}
		var due <-chan time.Time
		if wait >= 0 {
			timer.Reset(wait)
			due = timer.C
		}
		select {
		case <-due:
		case <-q.wake:
		case <-ctx.Done():
			return
		}
	}
}

// startJob runs one attempt on a goroutine that Close waits for.
func (m *Manager) startJob(id string, j *job) {
	q := &m.queue
	if !m.begin() {
		q.free <- struct{}{}
		return
	}
	go func() {
		defer m.work.Done()
		err := m.attempt(j)
		q.finish(id, j, err)
		q.free <- struct{}{}
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}()
}

func (m *Manager) attempt(j *job) (err error) {
	defer m.recovered(&err)
	ctx, cancel := context.WithTimeout(m.workCtx, jobTimeout)
	defer cancel()
	return j.run(ctx)
}
