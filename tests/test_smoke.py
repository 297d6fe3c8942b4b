from database import *
from tests.counting import *


def test_one(db):
    u = UserRepository.create(db, email="a@b.c")
    with counted_round_trips() as t, counted_statements() as s:
        UserRepository.get(db, u.id)
    assert (t.count, len(s)) == (1, 1)
    with counted_round_trips() as t:
        with transaction(db):
            UserRepository.get(db, u.id)
            UserRepository.create(db)
            UserRepository.create(db)
    assert t.count == 4
    c = ConversationRepository.create(db)
    with counted_round_trips() as t:
        MessageRepository.append(db, c.id, role="user", content="x")
    assert t.count == 1
